"""Log-likelihood vectors and what is measured on them."""
