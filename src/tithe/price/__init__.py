"""What training will take, from shapes alone: what `tithe price` prints, callable from Python.

outline  a model's name → a subject     offers  the table of methods     engine  prices them
show     tables                         plot    stacked bars
"""

from tithe.price.engine import price
from tithe.price.offers import OFFERS, Offer, Terms, parse_budget
from tithe.price.outline import Shape, outline
from tithe.price.plot import plot
from tithe.price.quote import Fit, Quote, Quotes
from tithe.price.show import show
from tithe.price.subject import Subject
from tithe.price.watch import Watch

__all__ = [
    "OFFERS",
    "Fit",
    "Offer",
    "Quote",
    "Quotes",
    "Shape",
    "Subject",
    "Terms",
    "Watch",
    "outline",
    "parse_budget",
    "plot",
    "price",
    "show",
]
