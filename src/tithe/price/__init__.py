"""What training will take, from shapes alone: `tithe price`."""
