"""The divergence D(pi_T, pi_theta), its gradients, and its fused computation."""
