"""Other people's models on our attention: one package per library, none of which the core imports."""
