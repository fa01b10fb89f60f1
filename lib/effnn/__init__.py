"""effnn: efficient inference and training of large neural network models, reproduced and reusable.

Each method is a room of its own (`effnn.ltp`, and others as they are built); a room knows torch, transformers and
`effnn.base` only, so it can be imported on its own and used on a model this project has never seen.
"""

__version__ = "0.1.0"
