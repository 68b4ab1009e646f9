"""Tithe inside other libraries' training loops, one module for each; a module needs its library installed."""
