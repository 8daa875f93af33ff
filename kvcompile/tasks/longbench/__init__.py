"""Task `longbench`: questions of LongBench (Bai et al., arXiv 2308.14508) from local files, and its metrics."""
