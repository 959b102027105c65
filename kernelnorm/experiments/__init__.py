"""The paper's case studies: recipes, data, training, and what comes out of it."""
