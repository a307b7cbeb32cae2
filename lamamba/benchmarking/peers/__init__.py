"""The systems of the paper's tables: diffusers' networks where they are exact, else small ones written from the papers.

Every network is called as LaMambaUNet is, `network(x, timestep, class_labels)`, and drops no labels. What is published
without code (DiffuSSM) or differs only in how it is sampled (guidance) is in lamamba.benchmarking.published.
"""
