"""Narrow number formats: values that are stored in 4 bits, and the arithmetic that makes them."""
