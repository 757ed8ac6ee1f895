"""Offline checkpoint tools: expand, reshard and inspect weights without a GPU and with bounded memory."""
