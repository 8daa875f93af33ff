"""Task `ruler`: the tasks of RULER (Hsieh et al., arXiv 2404.06654), generated here."""
