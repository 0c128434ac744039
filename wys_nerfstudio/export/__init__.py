"""The edited scene of a run as a data set, on which any method trains."""
