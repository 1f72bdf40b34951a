"""Data made while training: word problems of finite groups and formal languages, for studies of state tracking."""
