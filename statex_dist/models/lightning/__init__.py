"""Lightning attention (arXiv 2401.04658) as in MiniMax models: a fixed decay per head and layer, mixture of experts."""
