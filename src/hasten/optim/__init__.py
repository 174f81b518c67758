"""How weights change: optimizers by name, schedules, penalties, clipping, averaging, their state.

    gradients -> penalties (L1, L2) -> clipping -> optimizer (decoupled decay) -> averaging
                                                       ^
                                             schedule: a factor of the learning rate

Everything here works on named parameters and plain keyword arguments, and knows nothing of runs.
"""
