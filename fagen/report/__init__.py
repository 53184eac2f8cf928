"""`fagen report`: one page about a tuning run, made from its folder alone.

`load` reads what the folder has into plain facts, `charts` and its neighbours draw them as SVG, `page` puts them into
one HTML file that asks the network for nothing.
"""
