"""LAPTOP-Diff (arXiv 2404.11098): layer pruning by output loss, for LaMamba networks and diffusers U-Nets.

    network = find_units(model)                             # what can be removed
    scores = score(network, from_data(model, data))         # what removing each unit costs
    plan = make_plan(scores, remove=0.5)                    # the best set for a budget
    pruned = network.without(plan.removed)
"""

from lamamba.compression.additivity import measure_sets, rank_correlation, relative_loss
from lamamba.compression.calibration import Calibration, from_data, from_sampling
from lamamba.compression.find import candidates, find_units
from lamamba.compression.plan import Plan, in_order, make_plan
from lamamba.compression.scores import Scores, score
from lamamba.compression.units import Unit

__all__ = [
    "Calibration", "Plan", "Scores", "Unit", "candidates", "find_units", "from_data", "from_sampling", "in_order",
    "make_plan", "measure_sets", "rank_correlation", "relative_loss", "score",
]
