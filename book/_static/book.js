// What every page of the book does beside its theme.

// Paper is white: a page is printed in the light theme, and gets the reader's own theme back afterwards.
const root = document.documentElement;
let onScreen = null;
const paper = () => {
  onScreen ??= root.dataset.theme;
  root.dataset.theme = "light";
};
const screen = () => {
  if (onScreen) root.dataset.theme = onScreen;
  onScreen = null;
};
window.addEventListener("beforeprint", paper);
window.addEventListener("afterprint", screen);

// The buttons of folded solutions are all named "Toggle hidden content". Each gets the title beside it as its name.
document.addEventListener("DOMContentLoaded", () => {
  for (const button of document.querySelectorAll(".toggle-button")) {
    const title = button.closest(".admonition-title")?.textContent.trim();
    if (title) button.setAttribute("aria-label", title);
  }
});
