"""Nodes and links on one machine: network namespaces, shaped links, and a model of a link."""
