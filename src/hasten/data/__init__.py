"""From files of examples to packed batches.

    file -> rows.py -> Row or Rejected -> columns.py -> text and label -> tokens -> PackedBatch
               |                             |
           dialect.py                  inspection.py (what `hasten inspect` shows)

Nothing is imported here: reading a file must not cost the import of what trains a model.
"""
