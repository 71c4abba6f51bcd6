"""One inference engine a module, imported only when a model is opened with it."""
