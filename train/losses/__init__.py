"""The methods: saliency-guided losses, one a module, and distillation."""
