"""What the families of models are: one record each, and the tables that are derived from them."""
