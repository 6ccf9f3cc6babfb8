"""What is measured on evaluation texts: log-likelihoods of a model, and how far apart models and mixtures are.

score.py runs models; loglik.py has their log-likelihood vectors, eq. (3) and Delta; divergence.py eq. (2), true KL and distances
of weights; modelmap.py the plane in which models lie.
"""
