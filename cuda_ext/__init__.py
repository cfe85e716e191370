"""Attention over drafted blocks behind a paged prefix: the operations the drafter's inner loop is made of."""
