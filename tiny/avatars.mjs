// Draws DiceBear avatars for make_data.py: JSON lines {style, seed, colours} in, {svgs, parts} out.
// Each figure is drawn three times: in its colours, with every part black, and with hair in pure
// red, skin or robot in green and clothes in blue. The last two tell how much of each part a pixel
// holds.
import * as collection from '@dicebear/collection';
import { createAvatar } from '@dicebear/core';
import readline from 'node:readline';

const OPTIONS = {
  hair: ['hairColor', 'facialHairColor'],
  skin: ['skinColor', 'baseColor'],              // baseColor: micah's skin, bottts' robot
  clothes: ['clothesColor', 'clothingColor', 'shirtColor', 'bodyColor', 'hatColor'],
};
const BLACK = { hair: '000000', skin: '000000', clothes: '000000' };
const CODED = { hair: 'ff0000', skin: '00ff00', clothes: '0000ff' };

function draw({ style, seed }, colours) {
  const options = { seed, backgroundColor: [], glassesColor: ['2b2b30'],
                    accessoriesColor: ['2b2b30'], textureProbability: 0 };
  for (const part in OPTIONS)
    for (const option of OPTIONS[part]) options[option] = [colours[part]];
  return createAvatar(collection[style], options);
}

for await (const line of readline.createInterface({ input: process.stdin })) {
  const figure = JSON.parse(line);
  const avatar = draw(figure, figure.colours);
  const svgs = [avatar, draw(figure, BLACK), draw(figure, CODED)].map(String);
  console.log(JSON.stringify({ svgs, parts: avatar.toJson().extra }));
}
