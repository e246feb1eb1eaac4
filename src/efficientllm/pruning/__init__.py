"""The method itself: groups, saliency, selection, correction, schedule, surgery, and the engine on top.

Pure: torch and the standard library. It knows tensors and names; not transformers, ranks, files or logs.
"""
