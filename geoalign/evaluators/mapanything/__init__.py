"""MapAnything as a pose evaluator: a pose-only network of our own, and an adapter for the published package.

Import the modules directly (``geoalign.evaluators.mapanything.evaluator``); this file imports nothing.
"""
