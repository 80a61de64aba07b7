// Each strip of samples becomes one sample at a time, with a slider over the steps. The page reads well without.
for (const film of document.querySelectorAll(".film")) {
  const figures = [...film.querySelectorAll("figure")];
  if (figures.length < 2) continue;
  const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
  const slider = make("input", { type: "range", min: 0, max: figures.length - 1, step: 1 });
  slider.setAttribute("aria-label", film.dataset.label);
  const place = make("output", {});
  const button = make("button", { type: "button", textContent: "Play" });
  let timer = null;

  const show = (index) => {
    figures.forEach((figure, other) => {
      figure.classList.toggle("now", other === index);
      figure.setAttribute("aria-hidden", String(other !== index));
    });
    slider.value = index;
    place.value = figures[index].querySelector("figcaption").textContent;
    slider.setAttribute("aria-valuetext", place.value);
  };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    button.textContent = "Play";
  };
  slider.addEventListener("input", () => {
    stop();
    show(Number(slider.value));
  });
  button.addEventListener("click", () => {
    if (timer !== null) return stop();
    let index = Number(slider.value) === figures.length - 1 ? 0 : Number(slider.value);
    show(index);
    button.textContent = "Pause";
    timer = setInterval(() => {
      index += 1;
      show(index);
      if (index === figures.length - 1) stop();
    }, Math.max(150, 4000 / figures.length));
  });

  const controls = make("div", { className: "controls" });
  controls.append(button, slider, place);
  film.append(controls);
  film.classList.add("live");
  film.querySelector(".frames").removeAttribute("tabindex");
  show(figures.length - 1);
}
