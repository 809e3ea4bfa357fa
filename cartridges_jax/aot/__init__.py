"""Compilation of a run's programs ahead of time, for hardware that you do not have.

The functions that a run starts (train step, prefill, decode) are compiled from shapes alone. The
compiler's memory and collectives, an analytic count of the arithmetic and the published figures of
the hardware give the answers: does the run fit, what bounds it, which mesh is best.
"""
