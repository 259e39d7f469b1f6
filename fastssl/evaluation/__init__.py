"""How good the features are: weighted kNN, instance retrieval, and the report of a run."""
