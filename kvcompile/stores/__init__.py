"""Where one layer's keys and values lie: dense, ragged, paged, quantized, in host memory."""
