"""The demonstration behind `tithe demo`: real images, one network, every method in one table.

The images are part of the package: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine
Learning Repository, 1998, doi 10.24432/C50P49, licence CC BY 4.0 (digits.txt beside the data says it in full).
"""

from tithe.app.demo.show import run

__all__ = ["run"]
