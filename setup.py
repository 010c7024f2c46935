"The package's metadata lives in settings.ini (shared with nbdev); this file hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=['='])
parser.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
cfg = parser['DEFAULT']
lib = cfg['lib_path']

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
      author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
      classifiers=['Intended Audience :: Science/Research', 'Programming Language :: Python :: 3',
                   'Topic :: Scientific/Engineering :: Artificial Intelligence'],
      packages=find_packages(include=[lib, f'{lib}.*']), include_package_data=True, zip_safe=False,
      install_requires=cfg['requirements'].split(), extras_require={'dev': cfg['dev_requirements'].split()},
      python_requires='>=' + cfg['min_python'],
      long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
      long_description_content_type='text/markdown',
      entry_points={'nbdev': [f'{lib}={lib}._modidx:d'], 'console_scripts': cfg['console_scripts'].split()})
