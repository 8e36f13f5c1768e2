"""The Hessian along training: trajectories of its structure, and what of it is static and what dynamic ([D])."""

from hesscope.dynamics.adapters import hugging_face_callback, lightning_callback, tensorboard
from hesscope.dynamics.dynamic_force import DynamicForce, dynamic_force
from hesscope.dynamics.measures import Density, Eigenvalues, Energies, Heatmap, Heterogeneity, Trace
from hesscope.dynamics.schedule import Adaptive, log_spaced
from hesscope.dynamics.snapshot import EndEigenvalues, HeatMap, Snapshot
from hesscope.dynamics.tracker import Tracker
from hesscope.dynamics.trajectory import Trajectory, open_trajectory

__all__ = [
    "Adaptive",
    "Density",
    "DynamicForce",
    "Eigenvalues",
    "EndEigenvalues",
    "Energies",
    "HeatMap",
    "Heatmap",
    "Heterogeneity",
    "Snapshot",
    "Trace",
    "Tracker",
    "Trajectory",
    "dynamic_force",
    "hugging_face_callback",
    "lightning_callback",
    "log_spaced",
    "open_trajectory",
    "tensorboard",
]
