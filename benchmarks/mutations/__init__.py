"""Mutation testing of `calib/` and `passes/`: which small changes of the code does no test notice?"""
