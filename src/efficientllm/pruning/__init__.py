"""The method itself: groups, saliency, selection, calibration, correction, schedule, surgery, and the engine on top.

Pure: torch and the standard library. It knows tensors and names; not transformers, ranks, files or logs.
"""
