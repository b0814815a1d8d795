"""Sets ../darwin.txt as darwin.pdf. Needs reportlab."""
from reportlab.lib.styles import ParagraphStyle
from reportlab.platypus import Paragraph, SimpleDocTemplate

style = ParagraphStyle("text", fontName="Helvetica", fontSize=11, leading=14)
margins = dict.fromkeys(("leftMargin", "rightMargin", "topMargin", "bottomMargin"), 8)
document = SimpleDocTemplate("darwin.pdf", pagesize=(330, 90), **margins)
document.build([Paragraph(open("../darwin.txt").read(), style)])
