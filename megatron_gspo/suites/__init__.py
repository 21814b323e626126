"""Published evaluations: where their problems are, how they are asked, drawn and graded."""
