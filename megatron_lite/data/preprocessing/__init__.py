"""Text to Megatron's token files: what ``tools/preprocess_data.py`` does.

``sources`` cuts the inputs into tasks, ``records`` reads a task's texts, ``encode`` makes tokens of them,
``workers`` does that in several processes, ``journal`` lets a killed run go on, ``run`` puts them together.
"""
