"""The student: one module per way of learning, and what amalgamated features need.

The training loop is common/nets's.
"""
