const toggle = image => image.closest("figure").classList.toggle("zoomed");
document.querySelectorAll("figure img").forEach(image => {
  image.tabIndex = 0;
  image.title = "click to enlarge";
  image.addEventListener("click", () => toggle(image));
  image.addEventListener("keydown", event => { if (event.key === "Enter") toggle(image); });
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape")
    document.querySelectorAll("figure.zoomed").forEach(figure => figure.classList.remove("zoomed"));
});
