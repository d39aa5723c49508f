"""Data: one reader per kind of file, splits that do not leak, augmentation."""
