"""Whether a run is better than the model it began with: which rows may say so, how sure they are, and the judgement."""
