"""Rows into groups, trees and passes; no torch."""
