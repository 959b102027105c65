"""The efficient algorithm of KNConv, over interchangeable backends."""
