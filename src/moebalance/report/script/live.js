// A page served while training asks now and then whether there is more, and puts it in place.
async function follow(every = 2000) {
  let stamp = document.body.dataset.stamp;
  if (!stamp) return;
  const say = (words) => {
    const line = document.querySelector(".live span");
    if (line) line.textContent = words;
  };
  for (;;) {
    await new Promise((done) => setTimeout(done, every));
    if (document.hidden) continue;
    try {
      const now = await (await fetch("stamp", { cache: "no-store" })).text();
      if (now === stamp) continue;
      const text = await (await fetch("page", { cache: "no-store" })).text();
      const page = new DOMParser().parseFromString(text, "text/html");
      const main = document.importNode(page.querySelector("main"), true);
      document.querySelector("main").replaceWith(main);
      document.title = page.title;
      hideTip();
      start(main);
      stamp = page.body.dataset.stamp;
      say(`as of ${new Date().toLocaleTimeString()}`);
    } catch {
      say("the server does not answer; what is shown stays");
    }
  }
}
follow();
