"""From compiled pieces to tokens: keys, regions, links, KV slots, whole programs, prefill and
decode, dispatch.
"""
