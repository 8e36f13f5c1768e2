"""PAC-Bayes bounds: numbers in, numbers out; knows no networks (MATH.md, section 6).

With probability at least 1 - delta over n independent samples, for every posterior Q at once, the kl of the Gibbs
classifier's risk on the samples to its true risk is at most (KL(Q || P) + ln(2 sqrt(n)/delta)) / n, if the prior P was
fixed without the samples. `kl_inverse` turns that into a bound of the risk, and a `Certificate` lists all of it.

Sources: Maurer, arXiv:cs/0411099 (the form that is used); McAllester 1999; Catoni, arXiv:0712.0248; Hoeffding 1963 (the
Monte Carlo error); [DR] Dziugaite and Roy, arXiv:1703.11008 (for networks); [W] Wu et al., arXiv:2010.04261.
"""

from hesscope.bounds.bernoulli import bernoulli_kl, kl_inverse
from hesscope.bounds.certificate import Certificate, Row, require_enough_samples
from hesscope.bounds.forms import SCALES, catoni_bound, confidence_cost, least_samples, maurer_bound, mcallester_bound
from hesscope.bounds.gaussians import GaussianKL, dense_gaussian_kl, diagonal_gaussian_kl
from hesscope.bounds.grid import DEFAULT_GRID, VarianceGrid
from hesscope.bounds.monte_carlo import monte_carlo_upper

__all__ = [
    "DEFAULT_GRID",
    "SCALES",
    "Certificate",
    "GaussianKL",
    "Row",
    "VarianceGrid",
    "bernoulli_kl",
    "catoni_bound",
    "confidence_cost",
    "dense_gaussian_kl",
    "diagonal_gaussian_kl",
    "kl_inverse",
    "least_samples",
    "maurer_bound",
    "mcallester_bound",
    "monte_carlo_upper",
    "require_enough_samples",
]
