"""The paper's case studies: recipes, data, training, evaluation and reports."""
