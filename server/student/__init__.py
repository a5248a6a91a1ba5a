"""The student: one module per way of learning; the training loop is common/nets's."""
