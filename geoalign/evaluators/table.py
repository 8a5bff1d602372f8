"""The pose evaluators by name and what each needs; imports none of them, nor torch, so that a parser may read it."""

from __future__ import annotations

EVALUATORS = {
    "flow_pnp": "geoalign.evaluators.flow_pnp:FlowPnpEvaluator",
    "planar": "geoalign.evaluators.planar:PlanarAligner",
    "mapanything": "geoalign.evaluators.mapanything.evaluator:build_evaluator",
    "depth_anything_3": "geoalign.evaluators.depth_anything3:build_evaluator",
}
"""Name -> "module:callable". The callable takes keyword options, whose values are checked against its annotations."""
NEEDS_PLANE = ("planar", "flow_pnp")
"""They measure in metres by the ground plane of the source."""
WITH_WEIGHTS = ("depth_anything_3", "mapanything")
"""They need published weights (option ``checkpoint``) and read any video."""
WITHOUT_RESIDUAL = WITH_WEIGHTS
"""Their pose estimates say nothing about how well the pictures agree."""
