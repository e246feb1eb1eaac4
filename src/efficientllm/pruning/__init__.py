"""The method itself: groups, saliency, selection, calibration, schedule, surgery, and the pruner that ties them.

Pure: torch and the standard library. It knows tensors and names; not transformers, ranks, files or logs.
"""
