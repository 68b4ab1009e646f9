"""What training will take, from shapes alone: what `tithe price` prints, callable from Python.

outline  a model's name → a subject     offers  the table of methods     engine  prices them
show     tables                         plot    stacked bars
"""

from tithe.app.price.engine import price
from tithe.app.price.offers import OFFERS, USUAL, Offer
from tithe.app.price.outline import Shape, outline
from tithe.app.price.plot import plot
from tithe.app.price.quote import Fit, Quote, Quotes
from tithe.app.price.show import show
from tithe.app.price.subject import Subject
from tithe.app.price.terms import Terms, parse_budget

__all__ = [
    "OFFERS",
    "USUAL",
    "Fit",
    "Offer",
    "Quote",
    "Quotes",
    "Shape",
    "Subject",
    "Terms",
    "outline",
    "parse_budget",
    "plot",
    "price",
    "show",
]
